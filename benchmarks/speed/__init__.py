"""The parts of `benchmarks/steps_per_second.py`: what is timed (`ways`) and how (`clock`)."""
