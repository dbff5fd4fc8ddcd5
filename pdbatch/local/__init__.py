"""Services on this machine: the embedded Redis, the supervisor, and a whole cluster of them."""
