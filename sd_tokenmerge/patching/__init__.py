"""Merging in a denoiser: where its self-attentions are, and what happens around each of them.

apply      apply_patch, remove_patch               sites     self-attentions of a denoiser
patch      hooks, and their removal                targets   those that a config merges
attention  merge, attend, unmerge                  report    what was merged
block      a block's grid, input and partition     outline   a plan without weights
call       one call of the denoiser                features  what methods cluster
reuse      whether to compute a partition          compiled  the same under torch.compile
installed  processors that pipelines install later
recording  partitions kept to be looked at        one_thread calls from two threads at a time
"""
