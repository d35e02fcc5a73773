cd "$1"; export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
pip install -q --no-deps --no-build-isolation . 2>&1 | tail -1
export PYTHONPATH=$PWD
T="timeout 150 python3 -P -m pytest -q -p no:cacheprovider --tb=short"
$T tests/gpu/test_attention_kernels.py > $OUT/attention.log 2>&1 &
$T -x tests/gpu/test_chain.py > $OUT/chain.log 2>&1 &
timeout 60 python3 -P -m pytest -v -p no:cacheprovider --tb=short -x tests/gpu/test_peer_memory.py -k "who_does or replayed" > $OUT/peer.log 2>&1 &
wait
timeout 40 python3 -P .scratch_pair.py > $OUT/pair.log 2>&1
timeout 40 python3 -P -m benchmarks.attention_gpu > $OUT/attention_bench.log 2>&1
timeout 150 python3 -P .scratch_step.py 32 $OUT/kernels.txt > $OUT/step.log 2>&1
for f in peer chain attention; do echo "== $f"; tail -22 $OUT/$f.log | cut -c1-220; done
for f in pair attention_bench step; do echo "== $f"; tail -14 $OUT/$f.log | cut -c1-220; done
