"""Everything that trains or prunes; never imports a measure."""
