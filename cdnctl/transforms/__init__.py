"""What is linear and tested against its adjoint, and what is built on it."""
