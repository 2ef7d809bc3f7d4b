"""What programs import from the original's ``utils``."""

from hyaena.compat import dotdict, print_rank_0

__all__ = ["dotdict", "print_rank_0"]
