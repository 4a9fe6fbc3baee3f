"""`python -m sd_tokenmerge` is the `sd-tokenmerge` command."""

from sd_tokenmerge.cli import main

if __name__ == "__main__":
    main()
