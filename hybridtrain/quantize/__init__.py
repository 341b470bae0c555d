"""Quantised inference: formats of weights and activations, error compensation, and what they cost.

schemes.py      int4-g32-gptq and the like: what a scheme's name says
grids.py        the numbers that codes stand for, and the nearest one
gptq.py         codes that make up for each other's errors
source.py       the model that is quantised, opened
walk.py         layer by layer: calibration rows in, codes out
experts.py      matrices of experts that a model has in one parameter
joined.py       layers that have one scheme together
stored.py       formats of folders: compressed-tensors; floats8.py: torchao
measure.py      losses, divergence and agreement of two models on held-out rows
speed.py        how long a model takes, in turn with another, and in how much memory
compare.py      `hybridtrain compare`, of candidates.py; as_trained.py: a run's export with its products
write.py        `hybridtrain quantize`
"""
