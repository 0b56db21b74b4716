/* A CUDA runtime, cuBLAS and NCCL without a device, for tests: preloaded under torch's own CUDA build.
 *
 * Kernels and products do nothing, so no value that torch computes on the "device" is right. Device memory is host
 * memory, copies of up to COPIED bytes are made, and every event that tests count is appended to a log: launches, waits
 * of the host, copies and collectives. `tools/runtime.py` builds this file and reads the log.
 *
 * CUDA's own header gives the structures, whose layout differs between versions. The functions are declared here as the
 * binary interface has them, without their names for handles. `missing.h` is generated: it names every other function
 * that torch's libraries ask for, and these do nothing and succeed.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <driver_types.h>

#define COPIED ((size_t)1 << 20) /* larger copies move nothing: they would take the time that tests measure */
#define REGION ((size_t)256 << 30) /* addresses of the devices, and as many of pinned memory; untouched pages are free */
#define EVENTS (1l << 20)
#define KERNELS (1 << 18)

/* The log */

struct event {
    const char *kind;
    const void *what; /* host function of a kernel, handle of an event, or name of anything else */
    size_t bytes;
    long type; /* NCCL's number of the dtype of a collective */
};

static struct event *events;
static long written;

struct event *runtime_events(void) { return events; }
long runtime_written(void) { return __atomic_load_n(&written, __ATOMIC_SEQ_CST); }
void runtime_clear(void) { __atomic_store_n(&written, 0, __ATOMIC_SEQ_CST); }

static int note(const char *kind, const void *what, size_t bytes, long type)
{
    long place = __atomic_fetch_add(&written, 1, __ATOMIC_SEQ_CST);
    if (place < EVENTS)
        events[place] = (struct event){kind, what, bytes, type};
    return 0;
}

/* Kernels have names where they are registered, and are launched by the address of their host function. */

static struct { const void *host; const char *name; } *kernels;
static int registered;

const char *runtime_kernel(const void *host)
{
    for (int i = 0; i < registered; i++)
        if (kernels[i].host == host)
            return kernels[i].name;
    return "a kernel without a name";
}

void __cudaRegisterFunction(void **module, const void *host, char *device, const char *name)
{
    int place = __atomic_fetch_add(&registered, 1, __ATOMIC_SEQ_CST);
    if (place >= KERNELS)
        abort();
    kernels[place].host = host;
    kernels[place].name = name;
}

void **__cudaRegisterFatBinary(void *binary)
{
    static void *module[2];
    return module;
}

/* Memory: one range of addresses of the devices, one of pinned host memory, neither ever given back */

enum place { PAGEABLE, DEVICE, PINNED };

static char *base[3], *next[3];

static void *reserve(size_t size)
{
    void *memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        perror("runtime.c cannot reserve addresses");
        abort();
    }
    return memory;
}

__attribute__((constructor)) static void begin(void)
{
    events = reserve(EVENTS * sizeof *events);
    kernels = reserve(KERNELS * sizeof *kernels);
    for (int place = DEVICE; place <= PINNED; place++)
        base[place] = next[place] = reserve(REGION);
}

static enum place place_of(const void *address)
{
    for (int place = DEVICE; place <= PINNED; place++)
        if ((const char *)address >= base[place] && (const char *)address < base[place] + REGION)
            return place;
    return PAGEABLE;
}

static int take(enum place place, void **address, size_t size)
{
    *address = __atomic_fetch_add(&next[place], (size + 511) & ~(size_t)511, __ATOMIC_SEQ_CST);
    return 0;
}

int cudaMalloc(void **address, size_t size) { return take(DEVICE, address, size); }
int cudaHostAlloc(void **address, size_t size, unsigned flags) { return take(PINNED, address, size); }
int cudaMallocHost(void **address, size_t size) { return take(PINNED, address, size); }
int cudaGetSymbolAddress(void **address, const void *symbol) { return take(DEVICE, address, COPIED); }

int cudaMemGetInfo(size_t *free, size_t *total)
{
    *free = *total = (size_t)80 << 30;
    return 0;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *address)
{
    static const enum cudaMemoryType types[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeDevice, cudaMemoryTypeHost};
    memset(found, 0, sizeof *found);
    found->type = types[place_of(address)];
    found->devicePointer = found->hostPointer = (void *)address;
    return 0;
}

static void move(void *to, const void *from, size_t size)
{
    if (size <= COPIED && to != from)
        memmove(to, from, size);
}

/* The host waits for a copy to or from memory that is not pinned. */
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream)
{
    enum place target = place_of(to), source = place_of(from);
    move(to, from, size);
    if (target == DEVICE && source == DEVICE)
        return note("copy", "on the device", size, 0);
    if (target == PAGEABLE || source == PAGEABLE)
        note("wait", target == DEVICE ? "copy from pageable memory" : "copy to pageable memory", size, 0);
    return note("copy", target == DEVICE ? "to the device" : "to the host", size, 0);
}

int cudaMemcpy(void *to, const void *from, size_t size, int kind)
{
    note("wait", "blocking copy", size, 0);
    return cudaMemcpyAsync(to, from, size, kind, 0);
}

int cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size, void *stream)
{
    return cudaMemcpyAsync(to, from, size, 0, stream);
}

int cudaMemsetAsync(void *address, int value, size_t size, void *stream)
{
    if (size <= COPIED)
        memset(address, value, size);
    return note("fill", "cudaMemset", size, 0);
}

int cudaMemset(void *address, int value, size_t size) { return cudaMemsetAsync(address, value, size, 0); }

/* Launches. A real device refuses a grid beyond its limits; so does this one. */

static _Thread_local int failure;

static int launch(const void *host, dim3 grid, dim3 block)
{
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || block.x * block.y * block.z > 1024)
        return failure = cudaErrorInvalidConfiguration;
    return note("kernel", host, 0, 0);
}

int cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream)
{
    return launch(host, grid, block);
}

int __cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream)
{
    return launch(host, grid, block);
}

int cudaLaunchCooperativeKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared, void *stream)
{
    return launch(host, grid, block);
}

int cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *host, void **arguments)
{
    return launch(host, how->gridDim, how->blockDim);
}

int __cudaGetKernel(const void **kernel, const void *host)
{
    *kernel = host;
    return 0;
}

static _Thread_local struct { dim3 grid, block; size_t shared; void *stream; } pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream)
{
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return 0;
}

int __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void **stream)
{
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *host, int size, size_t shared)
{
    *blocks = 2;
    return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *host, int size, size_t shared, unsigned flags)
{
    *blocks = 2;
    return 0;
}

int cudaGetLastError(void)
{
    int found = failure;
    failure = 0;
    return found;
}

int cudaPeekAtLastError(void) { return failure; }
const char *cudaGetErrorName(int error) { return error ? "error of runtime.c" : "cudaSuccess"; }
const char *cudaGetErrorString(int error) { return error ? "a call that a device would refuse" : "no error"; }

/* Streams and events are numbers. */

static int new_handle(void **handle)
{
    static intptr_t last;
    *handle = (void *)(__atomic_add_fetch(&last, 1, __ATOMIC_SEQ_CST) << 8);
    return 0;
}

int cudaStreamCreate(void **stream) { return new_handle(stream); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return new_handle(stream); }
int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) { return new_handle(stream); }
int cudaEventCreate(void **event) { return new_handle(event); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return new_handle(event); }
int cudaEventRecord(void *event, void *stream) { return note("record", event, 0, 0); }
int cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return note("record", event, 0, 0); }
int cudaEventSynchronize(void *event) { return note("event", event, 0, 0); }
int cudaStreamSynchronize(void *stream) { return note("wait", "stream", 0, 0); }
int cudaDeviceSynchronize(void) { return note("wait", "device", 0, 0); }

int cudaEventElapsedTime(float *milliseconds, void *first, void *second)
{
    *milliseconds = 1;
    return 0;
}

static int zero(int *value)
{
    if (value)
        *value = 0;
    return 0;
}

int cudaStreamGetPriority(void *stream, int *priority) { return zero(priority); }
int cudaStreamIsCapturing(void *stream, int *status) { return zero(status); }
int cudaStreamGetCaptureInfo(void *stream, int *status) { return zero(status); }

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    zero(least);
    return zero(greatest);
}

/* Devices: RUNTIME_DEVICES of them, one if it is not set, of compute capability RUNTIME_CAPABILITY, 90 for 9.0 */

static _Thread_local int current;

static int setting(const char *name, int otherwise)
{
    const char *value = getenv(name);
    return value ? atoi(value) : otherwise;
}

static int capability(void) { return setting("RUNTIME_CAPABILITY", 90); }

static int value_of(int *place, int value)
{
    *place = value;
    return 0;
}

int cudaGetDeviceCount(int *count) { return value_of(count, setting("RUNTIME_DEVICES", 1)); }
int cudaGetDevice(int *device) { return value_of(device, current); }
int cudaSetDevice(int device) { return value_of(&current, device); }
int cudaDeviceCanAccessPeer(int *can, int from, int to) { return value_of(can, 1); }
int cudaRuntimeGetVersion(int *version) { return value_of(version, CUDART_VERSION); }
int cudaDriverGetVersion(int *version) { return value_of(version, CUDART_VERSION); }

int cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *host)
{
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->binaryVersion = found->ptxVersion = capability();
    found->maxDynamicSharedSizeBytes = 160 << 10;
    return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *found, int device)
{
    memset(found, 0, sizeof *found);
    strcpy(found->name, "no device");
    found->major = capability() / 10;
    found->minor = capability() % 10;
    found->totalGlobalMem = (size_t)80 << 30;
    found->multiProcessorCount = 108;
    found->warpSize = 32;
    found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxBlocksPerMultiProcessor = 32;
    found->maxGridSize[0] = INT32_MAX;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 48 << 10;
    found->sharedMemPerBlockOptin = 160 << 10;
    found->sharedMemPerMultiprocessor = 164 << 10;
    found->l2CacheSize = 40 << 20;
    found->textureAlignment = 512;
    found->unifiedAddressing = 1;
    return 0;
}

int cudaDeviceGetAttribute(int *value, int attribute, int device)
{
    struct cudaDeviceProp all;
    cudaGetDeviceProperties(&all, device);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return value_of(value, all.multiProcessorCount);
    case cudaDevAttrComputeCapabilityMajor: return value_of(value, all.major);
    case cudaDevAttrComputeCapabilityMinor: return value_of(value, all.minor);
    case cudaDevAttrWarpSize: return value_of(value, all.warpSize);
    case cudaDevAttrMaxThreadsPerBlock: return value_of(value, all.maxThreadsPerBlock);
    case cudaDevAttrMaxThreadsPerMultiProcessor: return value_of(value, all.maxThreadsPerMultiProcessor);
    case cudaDevAttrMaxRegistersPerBlock: return value_of(value, all.regsPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlock: return value_of(value, (int)all.sharedMemPerBlock);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return value_of(value, (int)all.sharedMemPerBlockOptin);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return value_of(value, (int)all.sharedMemPerMultiprocessor);
    case cudaDevAttrMaxGridDimX: return value_of(value, all.maxGridSize[0]);
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return value_of(value, all.maxGridSize[1]);
    case cudaDevAttrL2CacheSize: return value_of(value, all.l2CacheSize);
    default: return value_of(value, 1);
    }
}

int cudaDeviceGetPCIBusId(char *name, int size, int device)
{
    snprintf(name, size, "0000:%02x:00.0", device + 1);
    return 0;
}

/* The driver, which torch asks for by name or through the library libcuda.so.1, whose name this one bears */

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    *flags = 0;
    return value_of(active, 1);
}

int cuCtxGetCurrent(void **context) { return new_handle(context); }

int cuGetErrorString(int error, const char **text)
{
    *text = "an error of the driver";
    return 0;
}

static int nothing(void) { return 0; }

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, long flags, int *found)
{
    *function = !strcmp(name, "cuDevicePrimaryCtxGetState") ? (void *)cuDevicePrimaryCtxGetState
        : !strcmp(name, "cuGetErrorString")                  ? (void *)cuGetErrorString
                                                             : (void *)nothing;
    return zero(found);
}

/* cuBLAS */

int cublasCreate_v2(void **handle) { return new_handle(handle); }

int cublasLtMatmulAlgoGetHeuristic(
    void *library, void *how, void *a, void *b, void *c, void *d, void *preference, int wanted, void *found, int *count)
{
    return value_of(count, 1);
}

/* NCCL: the other ranks do what this one does, so each rank takes its own part for all others' and waits for nobody. */

struct id { char bytes[128]; };
struct communicator { int world, rank; };

static int communicator(void **made, int world, int rank)
{
    struct communicator *of = *made = malloc(sizeof *of);
    *of = (struct communicator){world, rank};
    return 0;
}

static int world_of(const void *in) { return ((const struct communicator *)in)->world; }
static int rank_of(const void *in) { return ((const struct communicator *)in)->rank; }

int ncclCommInitRank(void **made, int world, struct id id, int rank) { return communicator(made, world, rank); }

int ncclCommInitRankConfig(void **made, int world, struct id id, int rank, void *how)
{
    return communicator(made, world, rank);
}

int ncclCommSplit(void *whole, int color, int key, void **made, void *how)
{
    return communicator(made, world_of(whole), rank_of(whole));
}

int ncclGetVersion(int *version) { return value_of(version, 22700); }
int ncclCommCount(void *in, int *world) { return value_of(world, world_of(in)); }
int ncclCommUserRank(void *in, int *rank) { return value_of(rank, rank_of(in)); }
int ncclCommGetAsyncError(void *in, int *error) { return zero(error); }
const char *ncclGetErrorString(int error) { return "no error"; }
const char *ncclGetLastError(void *in) { return ""; }

static size_t width(int type)
{
    static const char widths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; /* by ncclDataType_t */
    return widths[type];
}

int ncclAllGather(const void *from, void *to, size_t count, int type, void *in, void *stream)
{
    size_t size = count * width(type);
    for (int rank = 0; rank < world_of(in); rank++)
        move((char *)to + rank * size, from, size);
    return note("collective", "all_gather", world_of(in) * size, type);
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int how, void *in, void *stream)
{
    move(to, from, count * width(type));
    return note("collective", "all_reduce", count * width(type), type);
}

int ncclReduceScatter(const void *from, void *to, size_t count, int type, int how, void *in, void *stream)
{
    move(to, from, count * width(type));
    return note("collective", "reduce_scatter", world_of(in) * count * width(type), type);
}

/* Torch gathers a list of tensors by a group of broadcasts, one from each rank. */

static _Thread_local struct { void *to[64]; const void *sent; size_t size; int count; } group;

int ncclGroupStart(void)
{
    group.sent = 0;
    group.count = 0;
    return 0;
}

int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *in, void *stream)
{
    size_t size = count * width(type);
    move(to, from, size);
    if (root == rank_of(in)) {
        group.sent = from;
        group.size = size;
    } else if (group.count < 64) {
        group.to[group.count++] = to;
    }
    return note("collective", "broadcast", size, type);
}

int ncclBcast(void *buffer, size_t count, int type, int root, void *in, void *stream)
{
    return ncclBroadcast(buffer, buffer, count, type, root, in, stream);
}

int ncclGroupEnd(void)
{
    for (int i = 0; group.sent && i < group.count; i++)
        move(group.to[i], group.sent, group.size);
    return ncclGroupStart();
}

/* All other functions: products of cuBLAS are launches, the rest does nothing. */

#define PRODUCT(name) int name(void) { return note("product", #name, 0, 0); }
#define NOTHING(name) int name(void) { return 0; }
#include "missing.h"
