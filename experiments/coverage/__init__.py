"""Which of torch's modules and operations each engine serves, against differences of gradients."""
