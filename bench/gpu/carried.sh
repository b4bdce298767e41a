#!/bin/bash
# Source it where SGLang is carried along in $SITE without all that it imports (README.md, "carried along"): stands in for
#   soundfile          whose library the machine lacks, which keeps transformers from importing any model
#   CUTLASS            for a product of two matrices of Llama's MLP; SGLang asks for it before it knows the dtype
#   IPython            an empty package, whose version matplotlib asks for
SITE=${SITE:?folder of the packages carried along}
python3 -c "import soundfile" 2>/dev/null || echo '__version__ = "0"' >"$SITE/soundfile.py"
python3 -c "import cutlass" 2>/dev/null || sed -i 's/        if not is_cuda():/        if True:  # no CUTLASS/' "$SITE/sglang/srt/layers/dual_gemm.py"
[ -s "$SITE/IPython/__init__.py" ] || echo 'version_info = (9, 0)' >"$SITE/IPython/__init__.py"
