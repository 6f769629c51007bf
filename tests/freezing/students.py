"""Architectures of the published teachers, with parameters and frozen shares of options 1, 2 and 3 in per cent."""

NCSNPP = {
    "img_channels": 3,
    "model_type": "SongUNet",
    "model_channels": 128,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
STUDENTS = {
    "cifar10": ({**NCSNPP, "img_resolution": 32, "channel_mult": [2, 2, 2]}, 56_395_523, (84.40, 86.50, 90.46)),
    "ffhq64": ({**NCSNPP, "img_resolution": 64, "channel_mult": [1, 2, 2, 2]}, 62_758_787, (83.84, 85.72, 89.70)),
    "imagenet64": (
        {
            "img_resolution": 64,
            "img_channels": 3,
            "label_dim": 1000,
            "model_type": "DhariwalUNet",
            "model_channels": 192,
            "channel_mult": [1, 2, 3, 4],
        },
        295_899_267,
        (78.77, 86.96, 90.17),
    ),
}
