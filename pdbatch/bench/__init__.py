"""How fast a model runs here, and how near to what the device could do: `pdbatch bench`.

workloads   what is asked: four kinds of jobs
floor       the least time that a device of these rates needs for one
stages      where the host's time went
kernels     what ran on a GPU, for the trace
measure     rounds of all that through `LLM`
"""
