"""Regular pooling by trying every number of bands and measuring what comes out."""

from __future__ import annotations


def grid_cells(height: int, width: int, num_clusters: int) -> list[list[int]]:
    """The cells of the best number of bands, as lists of token indices."""
    best: tuple[float, list[list[int]]] | None = None
    for bands in range(1, min(height, num_clusters) + 1):
        cells = []
        for band in range(bands):
            rows = range(band * height // bands, (band + 1) * height // bands)
            number = (band + 1) * num_clusters // bands - band * num_clusters // bands
            for cell in range(number):
                columns = range(cell * width // number, (cell + 1) * width // number)
                cells.append([y * width + x for y in rows for x in columns])
        if any(not cell for cell in cells):
            continue
        spread = sum(_spread(cell, width) for cell in cells)
        if best is None or spread < best[0] - 1e-6:
            best = (spread, cells)
    assert best is not None
    return best[1]


def _spread(cell: list[int], width: int) -> float:
    places = [divmod(token, width) for token in cell]
    center = [sum(place[axis] for place in places) / len(places) for axis in (0, 1)]
    return sum((y - center[0]) ** 2 + (x - center[1]) ** 2 for y, x in places)
