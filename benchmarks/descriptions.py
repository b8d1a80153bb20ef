"""The text of RESULTS.md and TABLES.md, and what each experiment compares and measures, for stored runs too."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    title: str
    text: str


INTRODUCTION = (
    "What was asked of the engine, and what was measured, as ratios. [TABLES.md](TABLES.md) has every time, its "
    "machine, its command and the plots; [NOTES.md](NOTES.md) has what else was tried. `python -m benchmarks.report` "
    "writes this page and TABLES.md from the stored runs in `results/`; do not edit them by hand."
)
TABLES_INTRODUCTION = (
    "Written by `python -m benchmarks.report` from `benchmarks/results/`; do not edit it by hand. "
    "[RESULTS.md](RESULTS.md) is its summary. A section begins with the command of its run, or, if that was not "
    "recorded, with the files that `python -m pytest FILES --benchmark-json RUN.json` ran. Times are medians over "
    "rounds in which all contenders are timed in turns (but starts, energy and the seconds of experiments are measured "
    "one after the other). IQR is the interquartile range; p95 is the time of the round nearest to the 95th "
    "percentile, which with few rounds is the slowest one; calls are those of the denoiser; predicted is the time that "
    "a static model gives for the same operations at the machine's ceilings (`benchmarks/roofline.py`). For the "
    "service, percentiles are over requests, capacity is the most requests per second that the engine answers, and an "
    "answer is good within four times what its request takes alone. In the experiments, ± is the standard deviation "
    "over the seeds: of training where models were trained, else of sampling."
)
ERRORS = (
    "Image error and text error are mean squared errors of the model's prediction of one modality on held-out images, "
    "at evenly spaced times, with the other modality known."
)
DESCRIPTIONS = {
    "architecture": Description(
        "PS-U-Net against U-ViT-multi",
        "All models are trained with the same data, seeds, batches, optimiser and noise schedule; the learning rate "
        "was chosen for PS-U-Net. There are three PS-U-Nets: as its preset trains it; with independent times, like the "
        "U-ViT; and with independent times and time tokens, so that it differs from the U-ViT only in the sharing of "
        f"blocks. {ERRORS}",
    ),
    "depths": Description(
        "Depths (N_text/N_image/N_shared) at equal parameters",
        "All models have the same number of blocks and of skips, and so of parameters; the cost of a forward differs. "
        + ERRORS,
    ),
    "modalities": Description(
        "Two modalities and three",
        "The third is a line drawing of the image (`emoji-sketch`), which then had no blocks before and after the "
        "shared ones, and which the errors and scores of the other two do not see: while they are measured it is "
        "pure noise, or generated after them. Every choice of known modalities is equally frequent in training, so "
        "with three a smaller part of the samples trains each of the old tasks. Sketch to image is retrieval@1 of "
        "images made from drawings alone; image to sketch is the F1 of the edges of drawings made from images. "
        + ERRORS,
    ),
    "masking": Description(
        "Joint infilling by masked share",
        "Random tokens of the image, random words of the name, or both are masked and generated, both together; errors "
        "are measured inside the masks. At ratio 0 there would be nothing to generate. The number of words of a name "
        "is always given; with both masked at ratio 1, it is all that is given.",
    ),
    "guidance": Description(
        "Guidance: quality against diversity",
        "One model is used throughout. Text-to-image: masked and empty guidance, each with renoised and with clean "
        "conditioning; the model was trained for one of these four combinations. Joint, both modalities together: "
        "alternate guidance (two passes) and UniDiffuser's (three). Quality is retrieval@1 of the name, in joint "
        "generation word F1 against the name of the nearest image, and with `--features` a Fréchet distance. Diversity "
        "is the RMS difference, in levels 0 to 255, between samples of one name, in joint generation between all "
        "samples.",
    ),
    "approximations": Description(
        "Approximations: quality against time",
        "Images are generated from names (text-to-image) and names from images (image-to-text) in 4, 8 and 16 steps, "
        "without and with each approximation. Seconds are those of the steps, per sample, with all samples in one "
        "batch; they can be compared within one run only.",
    ),
    "autoregression": Description(
        "Long texts: diffusion against an autoregressive transformer",
        "A PS-U-Net of text alone, which denoises the vectors of up to 64 words together, and a causal transformer, "
        "which draws one word after the other at temperature 1. Both are trained on the same texts with the same "
        "batch, optimiser and constant learning rate, which was tuned for neither. They have as many parameters, "
        "tables of word vectors included, and the steps are such that both trainings take as many operations of matrix "
        "products. The diffusion model's table is Word2Vec's; the transformer's begins as a copy of it and is trained. "
        "Perplexity is under an interpolated Kneser-Ney model of the training texts: the nearer to that of held-out "
        "texts, the better; what repeats the training texts has a lower one. Distinct n-grams are a part of all "
        "n-grams; known ones are in the training texts.",
    ),
}
