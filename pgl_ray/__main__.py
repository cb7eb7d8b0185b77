"""python -m pgl_ray: the list of doors; python -m pgl_ray DOOR ...: one of them."""

from pgl_ray import cli

if __name__ == "__main__":
    cli.console()
