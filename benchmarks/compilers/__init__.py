"""What the compilers for TPUs and GPUs make of a step; no device is needed."""
