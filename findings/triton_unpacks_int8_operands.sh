#!/usr/bin/env bash
# triton 3.6.0 and 3.9.0, compiled for sm_80 to sm_120 without a GPU: the usual loop over an INT8 tl.dot.
#
# A guess: a newer compiler turns the same INT8 product into the same tensor-core code or better. Seen: for a tile of
# 128 x 256 x 64 on 8 warps both versions have 64 `mma.sync` a turn on sm_80, 86 and 89. 3.9.0 adds 352 `prmt` to
# them: it fetches one operand ahead into registers and takes its words apart into bytes and together again, where 3.6.0
# has none. sm_90 (wgmma) and sm_120 are not touched. So the cards for which INT8 matters most get the slower code.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" <<'PY'
import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a, b, out, k, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, along = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a += i[:, None] * k + along[None, :]
    b += j[None, :] * k + along[:, None]
    total = tl.zeros([M, N], tl.int32)
    for _ in range(0, k, K):
        total = tl.dot(tl.load(a), tl.load(b), total, out_dtype=tl.int32)
        a += K
        b += K
    tl.store(out + i[:, None] * N + j[None, :], total)


signature = {"a": "*i8", "b": "*i8", "out": "*i32", "k": "i32", "M": "constexpr", "N": "constexpr", "K": "constexpr"}
source = ASTSource(
    product,
    signature,
    constexprs={"M": 128, "N": 256, "K": 64},
    attrs={(argument,): [["tt.divisibility", 16]] for argument in range(4)},
)
counts = {}
for capability in (80, 86, 89, 90, 120):
    options = {"num_warps": 8, "num_stages": 3}
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    counts[capability] = [ptx.count("prmt"), ptx.count("mma.sync"), ptx.count("wgmma.mma_async")]
print(json.dumps(counts))
PY
for version in 3.6.0 3.9.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "triton==$version" numpy==2.4.6 setuptools
    TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/look.py" 2>/dev/null > "$folder/$version.json"
    echo "triton $version, [prmt, mma.sync, wgmma] by capability: $(cat "$folder/$version.json")"
done
python3 - "$folder" <<'PY'
import json
import sys

old, new = (json.load(open(f"{sys.argv[1]}/{version}.json")) for version in ("3.6.0", "3.9.0"))
for capability in ("80", "86", "89"):
    assert old[capability] == [0, 64, 0] and new[capability][1] == 64, (old, new)
    assert new[capability][0] > 300, new
for capability in ("90", "120"):
    assert old[capability][0] == new[capability][0] == 0, (old, new)
PY
