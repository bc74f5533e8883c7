"""Several processes as one: torchrun starts them, torch.distributed connects them, each takes its share of the work.

Work is shared in two ways. Of a training step, all hold the same weights: each encodes and decodes its own rows,
gathers everybody's results and computes the loss of the whole batch from them; its gradient goes back into its own rows
only, and the sum over the processes of what reaches the weights is the gradient. (Where they share features instead,
see `saes.sharing`, each has all rows and its own features.) Of a list of works, such as trainings, each is done by one
process, `work.share`, which is alone while it does it; what comes out are files. A single process shares nothing, and
every function here then leaves things as they are.

`joining` begins and ends a run, over a `connection`; `exchange` is what processes tell one another, `work` a list of
works that they share, `gradients` those of a step, `homes` who sees whose files.

Processes of several machines may share a folder or not. Those that do are at one home: one of them writes what all need
once.

gloo connects processes on CPUs, nccl those on GPUs, which is untested.
"""
