"""`python -m tcompress`."""

from tcompress.cli import app

if __name__ == "__main__":
    app(prog_name="python -m tcompress")
