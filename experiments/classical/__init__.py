"""Classical test functions of unconstrained minimisation."""
