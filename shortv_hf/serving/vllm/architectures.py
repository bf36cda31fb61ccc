"""What the plug-in knows by name: the models it brings, and the text models that it can freeze layers of."""

# Names in a config's `architectures`; the classes are in `models.py`.
MODELS = (
    "ShortVLlavaForConditionalGeneration",
    "ShortVLlavaNextForConditionalGeneration",
    "ShortVQwen2VLForConditionalGeneration",
    "ShortVQwen2_5_VLForConditionalGeneration",
)
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen2_vl_text", "qwen2_5_vl_text")  # model types of text configs
