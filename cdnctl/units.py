"""The scale on which people state noise levels; [0, 1] everywhere behind the border.

A module without imports: the command line needs it for texts that must come at once.
"""

PEAK = 255
"""White on that scale."""
