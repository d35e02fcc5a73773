"""Two ranks of one GPU: the protocol's time without a link."""
import torch, time, statistics
from tests.gpu.test_peer_memory import Ranks, run, not_by_nccl
from tests.gpu.peer_cases import Case, brought, summed
from runtime.communication.peer_memory.choice import Choice
ranks=Ranks(2)
for way in ("small","large"):
    for size in (4096, 32768, 131072, 1<<20, 1<<24):
        if way=="small" and size>131072*2: continue
        parts=[brought(r,(size,),torch.bfloat16,1) for r in range(2)]
        run(Case("all_reduce",parts,[summed(parts)]*2),way,ranks)
        graphs=[]
        for r,p in enumerate(ranks.peers):
            f=p.prepare("all_reduce",otherwise=not_by_nccl); g=torch.cuda.CUDAGraph()
            with torch.cuda.graph(g,stream=ranks.streams[r]):
                for _ in range(50): f(parts[r])
            graphs.append(g)
        ts=[]
        for _ in range(8):
            torch.cuda.synchronize(); t=time.perf_counter(); ranks.each(lambda _,r: graphs[r].replay()); torch.cuda.synchronize(); ts.append((time.perf_counter()-t)/50*1e6)
        print(way,size*2,"bytes:",f"{statistics.median(ts):.2f} us",flush=True)
