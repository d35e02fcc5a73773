"""One GPU: decode step of an 8B shape, compiled and captured, and prefill with defaults."""
import os, sys, time, warnings
os.environ["HF_HUB_OFFLINE"]="1"
import torch
warnings.simplefilter("ignore")
from benchmarks.decode_gpu import build, measured_speed, prompts, kernels, seconds, PROMPT, FEW, MANY
from partitioner import Plan, partition
from partitioner.sharding.mesh import Mesh
from runtime.communication.thread_communicator import ThreadGroup
layers=int(sys.argv[1]); out=sys.argv[2]
with torch.no_grad():
    t=time.time(); model=build(layers); parts=partition(model, Plan()); print(f"built and partitioned {time.time()-t:.0f} s", flush=True)
    eager=parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda")
    for length in (4096, 16384):
        ids=torch.randint(0,128256,(1,length),device="cuda")
        for step in (None, 512):
            options={} if step is None else {"prefill_step": step}
            run=lambda n: eager.generate(ids, max_new_tokens=1, eos_token_id=[], **options)
            run(1); took=min(seconds(run,1) for _ in range(3))
            flops=2*(sum(p.numel() for p in model.parameters())-2*128256*4096)*length + layers*2*length*length*4096
            print(f"prefill {length}, step {step}: {took*1e3:.1f} ms, {flops/took/1e12:.0f} TFLOP/s, memory {torch.cuda.max_memory_allocated()/1e9:.1f} GB", flush=True)
    a=torch.randn(8192,8192,device="cuda",dtype=torch.bfloat16); a@a; torch.cuda.synchronize(); t=time.perf_counter(); [a@a for _ in range(10)]; torch.cuda.synchronize(); print(f"matmul {10*2*8192**3/(time.perf_counter()-t)/1e12:.0f} TFLOP/s")
    plain=eager.generate(prompts(1), max_new_tokens=MANY, eos_token_id=[])
    del eager
    speed=measured_speed()
    for compile in (False, True):
        e=parts.engine(0, ThreadGroup(Mesh.of()).communicator(0), device="cuda", compile=compile, cuda_graph=True)
        for batch in (1,):
            ids=prompts(batch); t=time.time(); said=e.generate(ids, max_new_tokens=MANY, eos_token_id=[]); warm=time.time()-t
            run=lambda n: e.generate(ids, max_new_tokens=n, eos_token_id=[])
            run(FEW)
            best=min((seconds(run,MANY)-seconds(run,FEW))/(MANY-FEW) for _ in range(4))
            weights=sum(p.nbytes for p in model.parameters())-model.get_input_embeddings().weight.nbytes
            cache=parts.cache_bytes(max_batch=batch,max_length=PROMPT+(FEW+MANY)//2)[0]
            limit=(weights+cache)/speed
            same=int((said[0,PROMPT:]==plain[0,PROMPT:]).long().cumprod(0).sum()) if batch==1 else -1
            print(f"compile={compile} batch {batch}: {best*1e3:.3f} ms/token, limit {limit*1e3:.3f} ({speed/1e12:.2f} TB/s) = {limit/best:.0%}, warm {warm:.0f} s, first {same} as eager", flush=True)
        if compile:
            kernels(e, prompts(1), out)
            ids=torch.randint(0,128256,(1,3000),device="cuda"); t=time.time(); e.generate(ids,max_new_tokens=16,eos_token_id=[]); print(f"a longer text: {time.time()-t:.1f} s", flush=True)
        del e
