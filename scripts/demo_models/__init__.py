"""The two demonstration models that `train_shapes_vlm.py` trains."""
