"""ViTs that somebody else wrote, as packed tokens see them."""
