"""From calibration batches to refitted projections."""
