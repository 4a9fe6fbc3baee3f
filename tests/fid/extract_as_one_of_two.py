"""One of two processes that extract a set together; started by test_processes.py."""

from __future__ import annotations

import sys

import torch

from sd_tokenmerge.fid.evaluate import compare
from sd_tokenmerge.fid.features import extract_features
from tests.fid.toy import toy_extractor

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, extractor, target = sys.argv[1:]
    chosen = toy_extractor() if extractor == "toy" else extractor
    result = extract_features(folder, extractor=chosen, device="cpu", batch_size=5)
    again = extract_features(folder, extractor=chosen, device="cpu", batch_size=5)
    torch.save(
        {
            "features": result.features,
            "again": again.features,
            "from_cache": (result.from_cache, again.from_cache),
            "files": list(result.files),
            "fid": compare(result, result, standard_error=False).fid,
        },
        target,
    )
    torch.distributed.destroy_process_group()
