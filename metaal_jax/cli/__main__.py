"""`python -m metaal_jax.cli` is the command `metaal`."""

from metaal_jax.cli import main

if __name__ == "__main__":
    main()
