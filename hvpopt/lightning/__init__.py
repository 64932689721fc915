"""Lightning's side of hvpopt: callbacks, data modules, modules and the task `train`."""
