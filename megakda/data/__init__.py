"""Token data: tokenizers, preprocessing, and checks of megatron-core's indexed format."""
