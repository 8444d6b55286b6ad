"""Local losses, replicated over blocks, patches and groups at the cost of one."""
