"""The mathematics: processes, heads, time grids, the denoiser, guidance and the sampler."""
