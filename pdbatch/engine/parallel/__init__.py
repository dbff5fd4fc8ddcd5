"""One model on several devices: N ranks, each with its part of every layer and of every block.

    rank 0       the engine's own process: scheduler, sampler, sockets, and a part of the model
    rank 1..N-1  processes that rank 0 starts and that obey it (`rank`)

    a step:  rank 0 ──packed input──► every rank's runner ──partial sums──► all-reduce ──► rank 0

What is shared how (`shard`): heads of the merged q,k,v product, with the columns of o_proj that
take them; rows of gate and up, with the columns of down_proj; the same within each expert; rows
of the language head. Embeddings, norms and routers are whole on every rank. Two sums over the
ranks a layer, one gather a step. Numbers of steps go over Unix sockets (`messages`), sums and
gathers through NCCL, on the CPU through gloo (`group`).

A rank that ends takes the whole engine with it (`team`); ranks end with rank 0's process.
"""
