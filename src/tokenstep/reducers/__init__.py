"""Token reducers: each decides between blocks which tokens merge or halt."""
