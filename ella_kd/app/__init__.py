"""Programs around the library: the page, grids, batches, benchmarks."""
