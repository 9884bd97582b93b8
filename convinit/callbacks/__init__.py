"""`DriftCallback` for the trainers of other libraries: in `convinit.callbacks.transformers` and `.lightning`."""
