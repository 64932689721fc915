"""Cost of second-order products, measured beside their bound in floating-point operations."""
