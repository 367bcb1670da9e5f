"""Evaluation: COCO's numbers for every data set and backend, classifiers, comparisons, and what is written of them."""
