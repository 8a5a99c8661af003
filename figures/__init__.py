"""Tables in, figures out: ``draw(tables) -> Figure``, one file a figure. ``python -m figures`` draws them all."""
