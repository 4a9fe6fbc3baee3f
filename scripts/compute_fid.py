"""`sd-tokenmerge fid` as a script: `python scripts/compute_fid.py REFERENCE GENERATED`."""

import sys

from sd_tokenmerge.cli import main

if __name__ == "__main__":
    main(["fid", *sys.argv[1:]])
