"""Merging in a denoiser: where its self-attentions are, and what happens around each of them.

`apply` attaches a patch to the self-attentions that `sites` finds and `targets` chooses. `call`
describes one call of the denoiser. `attention` merges, attends and unmerges. `reuse` decides
whether a partition is computed, from `features`, or reused; in compiled models, the operator of
`compiled` asks it. `report` says what was merged. `outline` plans a patch without weights.
"""
