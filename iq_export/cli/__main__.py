"""`python -m iq_export.cli`, for environments whose scripts are not on the PATH."""

from iq_export.cli import entry

if __name__ == "__main__":
    entry()
