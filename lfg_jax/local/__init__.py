"""Local losses, replicated over blocks, patches and groups at the cost of one.

In reading order: `targets`, `row_losses`, `info_nce`, `replicated`, `heads`, `staged`,
`lookahead`, `blockwise`, `objectives`.
"""
