"""Generate images of the ImageNet classes; the same as `sd-tokenmerge generate`."""

import sys

from sd_tokenmerge.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
