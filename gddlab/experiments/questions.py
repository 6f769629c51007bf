"""What is asked, declared before it is run: a notebook, the arms that are compared, the scores that decide."""

from __future__ import annotations

from gddlab.experiments.experiment import Question

PRIMARY = ("fd-lite2", "kd-lite2:held-out")
"""To the training images, and the unbiased one to images that nobody has trained on."""
BESIDE = ("kd-lite2", "fd-digits", "precision-lite2", "recall-lite2", "class-chi2-digits", "confidence-digits")
"""Other judges, shown beside every distance."""
OWN_RATE = "gdd-lr-0.0002"
"""GDD of the digits at a quarter of the preset's learning rate, which suits it."""
CENTRAL = ("gdd-i", OWN_RATE, "gdd", "random-50", "random-80", "scratch")
COPYING = ("pd", "cd", "ctm", "rcd")
RANDOM = tuple(f"random-{p}" for p in (20, 40, 50, 60, 70, 80, 88, 95, 99.6))
ORDERED = (*(f"ordered-{p}" for p in (40, 60)), "gdd-i", "option-2", "option-3", "ordered-95", "norms-only")
RATES = (
    *(f"gdd-lr-{lr}" for lr in ("0.0001", "0.0002", "0.0004")),
    *(f"{name}-lr-{lr}" for name in ("gdd-i", "random-50") for lr in ("0.0002", "0.0004", "0.0016")),
)
COUNTS = (50, 100, 200, 599)
JUDGES = (*PRIMARY, "fd-digits")
"""With the distance of a classifier of the data, which is no relative of any discriminator."""
RATED = "30 November 2026: seed 0 had shown that the preset's learning rate, 8e-4, suits GDD-I, and a quarter of it GDD"


def versus(reference: str, *arms: str) -> tuple[tuple[str, str], ...]:
    return tuple((arm, reference) for arm in arms)


QUESTIONS = (
    Question(
        "12_main_results",
        "Does a GAN loss alone turn the teacher into a one-step generator? Is freezing by the authors' rule better "
        "than training everything, each at its own learning rate and at one; than freezing as much, or half, at "
        "random? Do random weights fail?",
        arms=(*CENTRAL, *COPYING, "gdd-cd"),
        contrasts=(("gdd-i", OWN_RATE), *versus("gdd", "gdd-i", "scratch"), *versus("random-80", "gdd-i"))
        + versus("random-50", "gdd-i"),
        primary=JUDGES,
        also=(*BESIDE, "copying-lite2", "copying-pixels"),
        at=12,
        since=RATED,
        chosen_by=(0,),
        studies=("teacher-steps", "known-cases"),
    ),
    Question(
        "10_fid_over_images",
        "How fast does the distance fall over the images seen, and which methods are still falling where they end?",
        arms=("gdd-i", OWN_RATE, "gdd", "random-50", "rcd", "scratch"),
        primary=PRIMARY,
        at=40,
        studies=("teacher-steps", "known-cases"),
    ),
    Question(
        "13_second_extractor",
        "Do other judges order the students as fd-lite2 does: lite0, a ResNet-50 that is no relative of it, a "
        "classifier of the same data, precision, recall, held-out images?",
        arms=(*CENTRAL, *COPYING, "gdd-cd", "stylegan2"),
        primary=(
            "fd-lite2",
            "fd-lite0",
            "fd-open-nsfw",
            "fd-digits",
            "kd-lite2",
            "kd-lite2:held-out",
            "precision-lite2",
            "recall-lite2",
        ),
        contrasts=(("gdd-i", OWN_RATE), *versus("gdd", "gdd-i", "scratch"), *versus("random-80", "gdd-i"))
        + versus("random-50", "gdd-i", "random-80"),
        at=12,
        since=f"{RATED}; the ResNet-50, and four fifths against half at random, were added when all seeds were known",
        chosen_by=(0,),
        studies=("teacher-steps", "known-cases"),
    ),
    Question(
        "17_freezing",
        "How do distance, precision and recall depend on the share of the parameters that is frozen, and is it the "
        "freezing or the step size? Does the rule's order differ from a random one at equal share?",
        arms=("gdd", *RANDOM, *ORDERED, *RATES),
        contrasts=(
            *((f"ordered-{p}", f"random-{p}") for p in (40, 60, 95)),
            ("gdd-i", "random-80"),
            *versus(OWN_RATE, "gdd-i", "random-50"),
        ),
        primary=PRIMARY,
        also=("precision-lite2", "recall-lite2"),
        at=12,
        since=RATED,
        chosen_by=(0,),
        studies=("teacher-steps", "known-cases", "followed"),
    ),
    Question(
        "02_choosing_a_mask",
        "Which groups of layers, when they are trained, bring the student nearer to the data? The main effects of a "
        "two-level factorial over 17 groups, with their errors, at half of the preset's learning rate, where training "
        "all and a fifth are about as near; what a trained student loses when one group goes back to the teacher's "
        "weights. Then the mask that the effects predict as best at half the share, against its inverse, random masks "
        "of equal share and rate, the rule, and GDD at its own rate.",
        arms=("chosen", "chosen-inverse", "random-50-lr-0.0004", "gdd-i", OWN_RATE),
        contrasts=versus("chosen", "chosen-inverse", "random-50-lr-0.0004", "gdd-i", OWN_RATE),
        primary=PRIMARY,
        also=("precision-lite2", "recall-lite2"),
        at=12,
        since="30 November 2026, before a row of the factorial was run; GDD was added after nine rows",
        chosen_by=(0,),
        studies=("rewound", "pulls"),
    ),
    Question(
        "20_initialisation",
        "Is the ability the teacher's? Students of teachers of different age, of shuffled weights, of a network that "
        "only knows low noise, of one that has seen sigma 80, each as GDD at its own learning rate; and of random "
        "weights with other learning rates, augmentation and length.",
        arms=(
            *(OWN_RATE, *(f"age-{k}" for k in (80, 20, 5)), "from-high", "from-low", "shuffled"),
            *("scratch", "scratch-lr-0.0002", "scratch-lr-0.0016", "scratch-augment"),
            *(f"{name}-teacher-{s}" for s in (1, 2) for name in ("gdd", "gdd-i")),
        ),
        contrasts=(
            *versus(OWN_RATE, "age-80", "age-20", "age-5", "from-high", "shuffled", "scratch"),
            ("from-low", "age-80"),
            *versus("scratch", "scratch-lr-0.0002", "scratch-lr-0.0016", "scratch-augment"),
            *((f"gdd-i-teacher-{s}", f"gdd-teacher-{s}") for s in (1, 2)),
        ),
        primary=PRIMARY,
        at=12,
        since=RATED,
    ),
    Question(
        "14_local_minima",
        "Are students that copy the teacher held back? At three learning rates, of one seed, and after 12 and 40 "
        "thousand images; copies of the teacher in 2 to 16 steps; a GAN loss after copying and copying after a GAN "
        "loss, against either for as long; the distances along the line between students' weights, with two seeds of "
        "one student as the yardstick.",
        arms=(
            *(
                OWN_RATE,
                "gdd",
                "gdd-i",
                *COPYING,
                *(f"{name}-lr-{lr}" for name in COPYING for lr in ("0.0004", "0.0016")),
            ),
            *(f"rcd-{n}" for n in (2, 4, 8)),
            *("rcd-then-gdd", "gdd-then-rcd", "gdd-cd", "scratch"),
        ),
        contrasts=versus(OWN_RATE, *COPYING, "rcd-2", "rcd-4", "rcd-8", "gdd-cd"),
        primary=JUDGES,
        at=12,
        since=RATED,
        studies=("teacher-steps", "known-cases", "local-minima", "line"),
    ),
    Question(
        "21_data_efficiency",
        "How few distinct images are enough, for GDD-I and for GDD at its own learning rate, with another choice of "
        "images in each run? Does it matter whether the student sees the teacher's images or others?",
        arms=(
            *("gdd-i", OWN_RATE, *(f"{name}-images-{n}" for n in COUNTS for name in ("gdd-i", "gdd"))),
            *(f"{name}-other-images" for name in ("gdd-i", "gdd")),
        ),
        contrasts=(
            *((f"gdd-i-images-{n}", f"gdd-images-{n}") for n in COUNTS),
            *versus("gdd-i", *(f"gdd-i-images-{n}" for n in COUNTS)),
        ),
        primary=PRIMARY,
        also=("kd-lite2", "copying-pixels"),
        at=12,
        since=RATED,
    ),
    Question(
        "25_second_step",
        "Is a second step worth a second network call, and at which noise level? If it is not, why?",
        arms=("gdd-i", "second-step-0.2", "second-step-0.8", "second-step-2.5"),
        contrasts=versus("gdd-i", "second-step-0.2", "second-step-0.8", "second-step-2.5"),
        primary=PRIMARY,
        also=("fd-digits", "precision-lite2", "recall-lite2"),
        at=12,
        studies=("each-step",),
        since="30 November 2026: seed 0 had shown two steps to be worse by both; the study was added to find out why",
    ),
    Question(
        "19_augmentation_r1",
        "What do R1, augmentation, and fresh images in the discriminator's step change?",
        arms=("gdd-i", "fresh-fakes", "reuse-fakes", "no-r1", "augment", "ada"),
        contrasts=versus("gdd-i", "fresh-fakes", "reuse-fakes", "no-r1", "augment", "ada"),
        primary=PRIMARY,
        at=12,
    ),
    Question(
        "18_discriminators",
        "How much of the result is due to the discriminator, its architecture and its pretrained weights?",
        arms=("gdd-i", "lite0-64", "lite0-random", "vgg16-random", "deit-random", "lpips-random", "stylegan2")
        + ("lite0", "vgg16", "deit", "lpips"),
        contrasts=versus(
            "gdd-i", "lite0-64", "lite0-random", "vgg16-random", "deit-random", "lpips-random", "stylegan2"
        ),
        primary=PRIMARY,
        at=12,
    ),
    Question(
        "11_samples",
        "What do the networks' images look like, from the same noise?",
        arms=("gdd-i", OWN_RATE, "gdd", "random-50", "scratch", *COPYING),
    ),
    Question(
        "15_activations",
        "What is active in the teacher and in its students over noise levels, and do they respond to the input or to "
        "the level told?",
        arms=("gdd-i", "gdd"),
        studies=("layers", "input-or-level"),
    ),
    Question("16_moved_parameters", "How far has each layer moved?", arms=("gdd", "gdd-i"), studies=("layers",)),
    Question(
        "22_frequencies",
        "Which frequencies do teacher and students make, and which do their layers carry?",
        arms=("gdd", "gdd-i", "cd"),
        studies=("spectra", "layers"),
    ),
    Question(
        "24_editing",
        "What is a one-step student good for? Its completions of held-out images against the teacher's, by the number "
        "of network calls.",
        studies=("completed",),
    ),
    Question(
        "23_cost",
        "What does a training step cost?",
        arms=(
            "gdd-i",
            "gdd",
            *COPYING,
            "gdd-cd",
            "second-step-0.8",
            "fresh-fakes",
            "stylegan2",
            "lite0-64",
            "vgg16-random",
        )
        + ("deit-random", "lpips-random"),
        studies=("costs",),
    ),
    Question(
        "01_atlas", "What do the layers of a teacher respond to, and which are needed?", studies=("input-or-level",)
    ),
    Question(
        "04_architectures",
        "Where are U-Nets and transformers alike in what is active and what is needed?",
        studies=("architectures",),
    ),
)
