"""What each kind of unit of work does, in words for people, in the order of a run."""

STAGES = {
    "embed": "reading the source",
    "teacher": "running the source",
    "rotation": "learning the rotation",
    "sensitivity": "measuring what bits are worth",
    "allocation": "giving out bits",
    "ends": "rotating embedding and head",
    "enter": "starting the quantized model",
    "dense": "quantizing attention",
    "route": "routing tokens",
    "experts": "quantizing experts",
    "layer": "writing the layer",
    "student": "running the quantized layer",
}
