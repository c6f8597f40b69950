"""Code that the command-line programs share: from options to files, from errors to a status.

Nothing below this package may import it.
"""
