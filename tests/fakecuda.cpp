// A CUDA driver that only pretends, so that what is written for the real one can be tested without a GPU.
//
// Streams are threads that work through a queue in order, "device" memory is ordinary memory, and kernels are this
// project's own, built for the CPU through cuda_shim.h. The build (fake_cuda.py) puts that header and the kernels in
// front of this file, and names them by -DKERNELS="KERNEL(pull) KERNEL(push) ...".
//
// It is slower and stricter than the real one, so that mistakes show:
//
//   delays       before every operation and within every copy, so that a missing wait shows as old or torn data.
//   copies       go through the lower half of the bytes, pause, and go on with the upper.
//   host memory  must be registered for every copy, and is given by its host address; kernels, waits and writes find it
//                at another address, as on some systems. The real driver copies from any host memory, only slower.
//   addresses    that a call must not get are CUDA_ERROR_INVALID_VALUE, or CUDA_ERROR_ILLEGAL_ADDRESS in a launch, at
//                once and not later. What is freed while a stream still uses it is not noticed: while any stream has
//                work left, nothing is really freed or unmapped.
//   kernels      run one at a time in a process, but for the one that waits: the shim's atomicAdd is a plain sum.
//                New device memory is all NaN.
//
// Environment, read at every call:
//
//   FAKE_CUDA_JITTER_US=50    longest delay; half of the operations have none. Read when a stream is made, as is
//   FAKE_CUDA_SEED=1          the seed of the delays, in the order in which a process makes its streams.
//   FAKE_CUDA_FAIL=cuMemAlloc_v2=2,cuInit=100     these calls do nothing and return that error.
//   FAKE_CUDA_ATTR=122=0,86=1                     these attributes have that value.
//   FAKE_CUDA_VERSION=12040   FAKE_CUDA_DEVICES=2   FAKE_CUDA_FREE_MIB=100   FAKE_CUDA_PEERS=1
//   FAKE_CUDA_LOSES_WORDS=1                       what kernels store in single words arrives nowhere

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <tuple>

#include <sys/mman.h>
#include <unistd.h>

namespace {

using Address = std::uint64_t;
using Value = unsigned long long;

enum Result : int {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, NOT_SUPPORTED = 801,
};

struct Said { const char *name, *description; };

const std::map<int, Said> ERRORS = {
    {0, {"CUDA_SUCCESS", "no error"}},
    {1, {"CUDA_ERROR_INVALID_VALUE", "invalid argument"}},
    {2, {"CUDA_ERROR_OUT_OF_MEMORY", "out of memory"}},
    {3, {"CUDA_ERROR_NOT_INITIALIZED", "initialization error"}},
    {34, {"CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"}},
    {46, {"CUDA_ERROR_DEVICE_UNAVAILABLE", "CUDA-capable device(s) is/are busy or unavailable"}},
    {100, {"CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"}},
    {101, {"CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"}},
    {201, {"CUDA_ERROR_INVALID_CONTEXT", "invalid device context"}},
    {209, {"CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"}},
    {222, {"CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain"}},
    {400, {"CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"}},
    {500, {"CUDA_ERROR_NOT_FOUND", "named symbol not found"}},
    {600, {"CUDA_ERROR_NOT_READY", "device not ready"}},
    {700, {"CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"}},
    {712, {"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"}},
    {713, {"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"}},
    {801, {"CUDA_ERROR_NOT_SUPPORTED", "operation not supported"}},
    {803, {"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"}},
};

// Environment

long number(const char* name, const long otherwise)
{
    const char* text = std::getenv(name);
    return text && *text ? std::strtol(text, nullptr, 10) : otherwise;
}

// The value of `key` in NAME=key=value,key=value
long listed(const char* name, const std::string& key, const long otherwise)
{
    const char* text = std::getenv(name);
    const std::string list = "," + std::string(text ? text : "") + ",", entry = "," + key + "=";
    const auto at = list.find(entry);
    return at == std::string::npos ? otherwise : std::strtol(list.c_str() + at + entry.size(), nullptr, 10);
}

int attribute(const int which)
{
    static const std::map<int, int> usual = {
        {18, 0}, {20, 0}, {40, 2}, {41, 1}, {75, 9}, {76, 0}, {86, 0}, {88, 0}, {98, 0}, {99, 1}, {100, 0}, {122, 1},
    };
    const auto found = usual.find(which);
    return listed("FAKE_CUDA_ATTR", std::to_string(which), found == usual.end() ? -1 : found->second);
}

// Streams and events

class Delays {
public:
    explicit Delays(const unsigned seed) : random_(seed), longest_us_(number("FAKE_CUDA_JITTER_US", 0)) {}

    void sometimes()
    {
        if (longest_us_ > 0 && random_() % 2)
            usleep(random_() % longest_us_);
    }

    void within_a_copy()  // always, and long
    {
        if (longest_us_ > 0)
            usleep(longest_us_ / 2 + random_() % (longest_us_ / 2 + 1));
    }

private:
    std::minstd_rand random_;
    long longest_us_;
};

unsigned next_seed()
{
    static std::atomic<unsigned> streams{0};
    return 1 + 7919 * static_cast<unsigned>(number("FAKE_CUDA_SEED", 0)) + streams++;
}

using Operation = std::function<void(Delays&)>;

std::atomic<long> operations_left{0};  // in all streams, destroyed ones too

class Stream {
public:
    // The thread holds a share of the stream: a stream destroyed with work in it does that work first.
    static std::shared_ptr<Stream> start()
    {
        auto stream = std::make_shared<Stream>();
        std::thread([stream] { stream->work(); }).detach();
        return stream;
    }

    void put(Operation operation)
    {
        const std::lock_guard lock(mutex_);
        queue_.push_back(std::move(operation));
        ++left_;
        ++operations_left;
        changed_.notify_all();
    }

    void end()
    {
        const std::lock_guard lock(mutex_);
        ended_ = true;
        changed_.notify_all();
    }

    bool done()
    {
        const std::lock_guard lock(mutex_);
        return left_ == 0;
    }

    void wait()
    {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return left_ == 0; });
    }

private:
    void work()
    {
        std::unique_lock lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return ended_ || !queue_.empty(); });
            if (queue_.empty())
                return;
            const Operation operation = std::move(queue_.front());
            queue_.pop_front();
            lock.unlock();
            delays_.sometimes();
            operation(delays_);
            lock.lock();
            --left_;
            --operations_left;
            changed_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Operation> queue_;
    std::size_t left_ = 0;  // in the queue or at work
    bool ended_ = false;
    Delays delays_{next_seed()};
};

class Event {
public:
    Value record() { return ++recorded_; }
    Value recorded() const { return recorded_; }

    void reach(const Value record)
    {
        const std::lock_guard lock(mutex_);
        reached_ = std::max(reached_, record);
        changed_.notify_all();
    }

    void wait(const Value record)
    {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return reached_ >= record; });
    }

    bool done()
    {
        const std::lock_guard lock(mutex_);
        return reached_ >= recorded_;
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<Value> recorded_{0};
    Value reached_ = 0;
};

// Kernels

// What cuLaunchKernel does at once: it checks and copies the arguments. The rest is for the stream.
using Launch = Result (*)(Stream&, unsigned grid, unsigned block, void** arguments);

bool on_the_device(Address address, std::size_t size_bytes);

std::mutex& one_kernel_at_a_time = *new std::mutex;

template <class T> bool legal(T) { return true; }
template <class T> bool legal(T* pointer) { return !pointer || on_the_device(reinterpret_cast<Address>(pointer), 1); }

bool loses(const void* kernel)
{
    return kernel == reinterpret_cast<void*>(store_word) && number("FAKE_CUDA_LOSES_WORDS", 0);
}

template <class... A, std::size_t... I>
Result launch(void (*kernel)(A...), Stream& stream, const unsigned grid, const unsigned block, void** arguments,
              std::index_sequence<I...>)
{
    std::tuple<A...> values{*static_cast<A*>(arguments[I])...};
    if (!(legal(std::get<I>(values)) && ...))
        return ILLEGAL_ADDRESS;
    if (loses(reinterpret_cast<void*>(kernel)))
        return OK;
    const bool waits = reinterpret_cast<void*>(kernel) == reinterpret_cast<void*>(await_word);
    stream.put([=](Delays&) mutable {
        std::unique_lock lock(one_kernel_at_a_time, std::defer_lock);
        if (!waits)
            lock.lock();
        void* addresses[] = {const_cast<std::remove_const_t<A>*>(&std::get<I>(values))...};
        shim::launch(kernel, grid, block, addresses);
    });
    return OK;
}

template <class... A>
Result launch(void (*kernel)(A...), Stream& stream, const unsigned grid, const unsigned block, void** arguments)
{
    return launch(kernel, stream, grid, block, arguments, std::index_sequence_for<A...>{});
}

#define KERNEL(name) \
    {#name, [](Stream& stream, unsigned grid, unsigned block, void** arguments) { \
        return launch(name, stream, grid, block, arguments); \
    }},
const std::map<std::string, Launch> LAUNCHES = {KERNELS};
#undef KERNEL

// All that a process has asked for. Never destroyed, because streams may outlive main().

struct Registration {
    std::size_t size_bytes;
    Address mapped;  // where the device sees it
    bool is_twin;    // a second mapping of the same pages, to be unmapped again
};

struct Everything {
    std::mutex mutex;
    pid_t initialized_by = 0;
    int contexts = 0;
    std::map<Address, std::size_t> allocated;       // address on the device -> bytes
    std::map<Address, Registration> registered;     // address on the host -> what it is
    std::map<void*, std::shared_ptr<Stream>> streams;
    std::map<void*, std::shared_ptr<Event>> events;
    std::map<void*, std::unique_ptr<int>> modules;
    std::shared_ptr<Stream> default_stream;
};

Everything& all = *new Everything;
thread_local void* current_context = nullptr;
int the_context;  // its address is the handle

bool within(const Address address, const std::size_t size_bytes, const Address start, const std::size_t range_bytes)
{
    return address >= start && size_bytes <= range_bytes && address - start <= range_bytes - size_bytes;
}

bool allocated(const Address address, const std::size_t size_bytes)
{
    for (const auto& [start, bytes] : all.allocated)
        if (within(address, size_bytes, start, bytes))
            return true;
    return false;
}

bool mapped(const Address address, const std::size_t size_bytes)
{
    for (const auto& [start, one] : all.registered)
        if (within(address, size_bytes, one.mapped, one.size_bytes))
            return true;
    return false;
}

bool on_the_device(const Address address, const std::size_t size_bytes)
{
    return allocated(address, size_bytes) || mapped(address, size_bytes);
}

bool registered(const Address address, const std::size_t size_bytes)
{
    for (const auto& [start, one] : all.registered)
        if (within(address, size_bytes, start, one.size_bytes))
            return true;
    return false;
}

std::shared_ptr<Stream> stream_of(void* handle)  // null where there is none
{
    if (!handle) {
        if (!all.default_stream)
            all.default_stream = Stream::start();
        return all.default_stream;
    }
    const auto found = all.streams.find(handle);
    return found == all.streams.end() ? nullptr : found->second;
}

std::shared_ptr<Event> event_of(void* handle)
{
    const auto found = all.events.find(handle);
    return found == all.events.end() ? nullptr : found->second;
}

void copy_in_halves(Delays& delays, void* to, const void* from, const std::size_t size_bytes)
{
    const std::size_t half = size_bytes / 2;
    std::memcpy(to, from, half);
    delays.within_a_copy();
    std::memcpy(static_cast<char*>(to) + half, static_cast<const char*>(from) + half, size_bytes - half);
}

Result copy(void* to, const void* from, const std::size_t size_bytes, void* stream)
{
    const auto s = stream_of(stream);
    if (!s)
        return INVALID_HANDLE;
    s->put([=](Delays& delays) { copy_in_halves(delays, to, from, size_bytes); });
    return OK;
}

int text(const std::string& value, char* to, const int length)
{
    if (length <= static_cast<int>(value.size()))
        return INVALID_VALUE;
    std::memcpy(to, value.c_str(), value.size() + 1);
    return OK;
}

// What a call needs before it can do anything.
enum Need { NOTHING, DRIVER, CONTEXT };

Result missing(const char* call, const Need need)
{
    if (const long injected = listed("FAKE_CUDA_FAIL", call, OK))
        return static_cast<Result>(injected);
    if (need >= DRIVER && all.initialized_by != getpid())  // 0, or the parent's after a fork
        return NOT_INITIALIZED;
    if (need >= CONTEXT && !current_context)
        return INVALID_CONTEXT;
    return OK;
}

}  // namespace

#define BEGIN(need) \
    if (const Result result = missing(__func__, need)) \
        return result; \
    const std::lock_guard lock(all.mutex)
#define REQUIRE(condition, error) \
    if (!(condition)) \
    return error

extern "C" {

// For tests: how much has been asked for and not given back.
int fake_cuda_live()
{
    const std::lock_guard lock(all.mutex);
    return static_cast<int>(all.contexts + all.allocated.size() + all.registered.size() + all.streams.size() +
                            all.events.size() + all.modules.size());
}

int cuGetErrorName(const int error, const char** name)
{
    const auto found = ERRORS.find(error);
    *name = found == ERRORS.end() ? nullptr : found->second.name;
    return *name ? OK : INVALID_VALUE;
}

int cuGetErrorString(const int error, const char** description)
{
    const auto found = ERRORS.find(error);
    *description = found == ERRORS.end() ? nullptr : found->second.description;
    return *description ? OK : INVALID_VALUE;
}

int cuDriverGetVersion(int* version)
{
    BEGIN(NOTHING);
    *version = static_cast<int>(number("FAKE_CUDA_VERSION", 13000));
    return OK;
}

int cuInit(const unsigned flags)
{
    BEGIN(NOTHING);
    REQUIRE(flags == 0, INVALID_VALUE);
    REQUIRE(all.initialized_by == 0 || all.initialized_by == getpid(), NOT_INITIALIZED);
    all.initialized_by = getpid();
    return OK;
}

int cuDeviceGetCount(int* count)
{
    BEGIN(DRIVER);
    *count = static_cast<int>(number("FAKE_CUDA_DEVICES", 1));
    return OK;
}

int cuDeviceGet(int* device, const int ordinal)
{
    BEGIN(DRIVER);
    REQUIRE(0 <= ordinal && ordinal < number("FAKE_CUDA_DEVICES", 1), INVALID_DEVICE);
    *device = ordinal;
    return OK;
}

int cuDeviceGetName(char* name, const int length, const int device)
{
    BEGIN(DRIVER);
    return text("Fake GPU " + std::to_string(device), name, length);
}

int cuDeviceGetPCIBusId(char* id, const int length, const int device)
{
    BEGIN(DRIVER);
    return text("0000:" + std::to_string(10 + device) + ":00.0", id, length);
}

int cuDeviceGetAttribute(int* value, const int which, int)
{
    BEGIN(DRIVER);
    REQUIRE(attribute(which) >= 0, INVALID_VALUE);
    *value = attribute(which);
    return OK;
}

int cuDeviceCanAccessPeer(int* can, int, int)
{
    BEGIN(DRIVER);
    *can = static_cast<int>(number("FAKE_CUDA_PEERS", 0));
    return OK;
}

int cuDevicePrimaryCtxRetain(void** context, int)
{
    BEGIN(DRIVER);
    ++all.contexts;
    *context = &the_context;
    return OK;
}

int cuDevicePrimaryCtxRelease_v2(int)
{
    BEGIN(DRIVER);
    REQUIRE(all.contexts > 0, INVALID_CONTEXT);
    if (--all.contexts == 0)
        current_context = nullptr;
    return OK;
}

int cuCtxSetCurrent(void* context)
{
    BEGIN(DRIVER);
    REQUIRE(!context || (context == &the_context && all.contexts > 0), INVALID_CONTEXT);
    current_context = context;
    return OK;
}

// Memory

int cuMemHostRegister_v2(void* host, const std::size_t size_bytes, const unsigned flags)
{
    BEGIN(CONTEXT);
    const auto address = reinterpret_cast<Address>(host);
    REQUIRE(attribute(99), NOT_SUPPORTED);
    REQUIRE(host && size_bytes && address % 4096 == 0 && flags == 3, INVALID_VALUE);  // PORTABLE | DEVICEMAP
    for (const auto& [start, one] : all.registered)
        REQUIRE(address + size_bytes <= start || start + one.size_bytes <= address, ALREADY_REGISTERED);
    void* twin = mremap(host, 0, size_bytes, MREMAP_MAYMOVE);  // works for shared memory only
    const bool is_twin = twin != MAP_FAILED;
    all.registered[address] = {size_bytes, is_twin ? reinterpret_cast<Address>(twin) : address, is_twin};
    return OK;
}

int cuMemHostGetDevicePointer_v2(Address* device, void* host, const unsigned flags)
{
    BEGIN(CONTEXT);
    REQUIRE(flags == 0, INVALID_VALUE);
    for (const auto& [start, one] : all.registered)
        if (within(reinterpret_cast<Address>(host), 1, start, one.size_bytes)) {
            *device = one.mapped + (reinterpret_cast<Address>(host) - start);
            return OK;
        }
    return INVALID_VALUE;
}

int cuMemHostUnregister(void* host)
{
    BEGIN(CONTEXT);
    const auto found = all.registered.find(reinterpret_cast<Address>(host));
    REQUIRE(found != all.registered.end(), NOT_REGISTERED);
    if (found->second.is_twin && operations_left == 0)
        munmap(reinterpret_cast<void*>(found->second.mapped), found->second.size_bytes);
    all.registered.erase(found);
    return OK;
}

int cuMemAlloc_v2(Address* device, const std::size_t size_bytes)
{
    BEGIN(CONTEXT);
    REQUIRE(size_bytes, INVALID_VALUE);
    const std::size_t whole = (size_bytes + 255) / 256 * 256;
    void* memory = std::aligned_alloc(256, whole);
    REQUIRE(memory, OUT_OF_MEMORY);
    std::memset(memory, 0xff, whole);
    *device = reinterpret_cast<Address>(memory);
    all.allocated[*device] = size_bytes;
    return OK;
}

int cuMemFree_v2(const Address device)
{
    BEGIN(CONTEXT);
    REQUIRE(all.allocated.erase(device), INVALID_VALUE);
    if (operations_left == 0)
        std::free(reinterpret_cast<void*>(device));
    return OK;
}

int cuMemGetInfo_v2(std::size_t* free_bytes, std::size_t* total_bytes)
{
    BEGIN(CONTEXT);
    *total_bytes = 16ull << 30;
    *free_bytes = static_cast<std::size_t>(number("FAKE_CUDA_FREE_MIB", 12 << 10)) << 20;
    return OK;
}

int cuMemcpyHtoDAsync_v2(const Address device, const void* host, const std::size_t size_bytes, void* stream)
{
    BEGIN(CONTEXT);
    REQUIRE(allocated(device, size_bytes) && registered(reinterpret_cast<Address>(host), size_bytes), INVALID_VALUE);
    return copy(reinterpret_cast<void*>(device), host, size_bytes, stream);
}

int cuMemcpyDtoHAsync_v2(void* host, const Address device, const std::size_t size_bytes, void* stream)
{
    BEGIN(CONTEXT);
    REQUIRE(allocated(device, size_bytes) && registered(reinterpret_cast<Address>(host), size_bytes), INVALID_VALUE);
    return copy(host, reinterpret_cast<const void*>(device), size_bytes, stream);
}

int cuMemcpyDtoDAsync_v2(const Address to, const Address from, const std::size_t size_bytes, void* stream)
{
    BEGIN(CONTEXT);
    REQUIRE(allocated(to, size_bytes) && allocated(from, size_bytes), INVALID_VALUE);
    return copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size_bytes, stream);
}

int cuMemsetD32Async(const Address to, const unsigned bits, const std::size_t count, void* stream)
{
    BEGIN(CONTEXT);
    const auto s = stream_of(stream);
    REQUIRE(s, INVALID_HANDLE);
    REQUIRE(allocated(to, 4 * count) && to % 4 == 0, INVALID_VALUE);
    s->put([=](Delays&) { std::fill_n(reinterpret_cast<unsigned*>(to), count, bits); });
    return OK;
}

// Streams

int cuStreamCreateWithPriority(void** stream, const unsigned flags, int)
{
    BEGIN(CONTEXT);
    REQUIRE(flags <= 1, INVALID_VALUE);
    const auto made = Stream::start();
    *stream = made.get();
    all.streams[*stream] = made;
    return OK;
}

int cuStreamDestroy_v2(void* stream)
{
    BEGIN(CONTEXT);
    const auto found = all.streams.find(stream);
    REQUIRE(found != all.streams.end(), INVALID_HANDLE);
    found->second->end();
    all.streams.erase(found);
    return OK;
}

int cuStreamSynchronize(void* stream)
{
    std::shared_ptr<Stream> s;
    {
        BEGIN(CONTEXT);
        s = stream_of(stream);
        REQUIRE(s, INVALID_HANDLE);
    }
    s->wait();  // others may call meanwhile
    return OK;
}

int cuStreamQuery(void* stream)
{
    BEGIN(CONTEXT);
    const auto s = stream_of(stream);
    REQUIRE(s, INVALID_HANDLE);
    return s->done() ? OK : NOT_READY;
}

int cuStreamWaitEvent(void* stream, void* event, const unsigned flags)
{
    BEGIN(CONTEXT);
    const auto s = stream_of(stream);
    const auto e = event_of(event);
    REQUIRE(s && e, INVALID_HANDLE);
    REQUIRE(flags == 0, INVALID_VALUE);
    s->put([e, record = e->recorded()](Delays&) { e->wait(record); });
    return OK;
}

int cuStreamWaitValue64_v2(void* stream, const Address word, const Value value, const unsigned flags)
{
    BEGIN(CONTEXT);
    const auto s = stream_of(stream);
    REQUIRE(s, INVALID_HANDLE);
    REQUIRE(attribute(122), NOT_SUPPORTED);
    REQUIRE(word % 8 == 0 && on_the_device(word, 8) && flags == 0, INVALID_VALUE);  // only GEQ
    s->put([=](Delays&) {
        const auto* current = reinterpret_cast<const std::atomic<Value>*>(word);
        while (static_cast<long long>(current->load(std::memory_order_acquire) - value) < 0)
            usleep(5);
    });
    return OK;
}

int cuStreamWriteValue64_v2(void* stream, const Address word, const Value value, const unsigned flags)
{
    BEGIN(CONTEXT);
    const auto s = stream_of(stream);
    REQUIRE(s, INVALID_HANDLE);
    REQUIRE(attribute(122), NOT_SUPPORTED);
    REQUIRE(word % 8 == 0 && on_the_device(word, 8) && flags == 0, INVALID_VALUE);
    s->put([=](Delays&) { reinterpret_cast<std::atomic<Value>*>(word)->store(value, std::memory_order_release); });
    return OK;
}

// Events

int cuEventCreate(void** event, const unsigned flags)
{
    BEGIN(CONTEXT);
    REQUIRE(flags == 2, INVALID_VALUE);  // DISABLE_TIMING
    const auto made = std::make_shared<Event>();
    *event = made.get();
    all.events[*event] = made;
    return OK;
}

int cuEventDestroy_v2(void* event)
{
    BEGIN(CONTEXT);
    REQUIRE(all.events.erase(event), INVALID_HANDLE);
    return OK;
}

int cuEventRecord(void* event, void* stream)
{
    BEGIN(CONTEXT);
    const auto s = stream_of(stream);
    const auto e = event_of(event);
    REQUIRE(s && e, INVALID_HANDLE);
    s->put([e, record = e->record()](Delays&) { e->reach(record); });
    return OK;
}

int cuEventQuery(void* event)
{
    BEGIN(CONTEXT);
    const auto e = event_of(event);
    REQUIRE(e, INVALID_HANDLE);
    return e->done() ? OK : NOT_READY;
}

// Modules: whatever is loaded, every kernel is in it

int cuModuleLoadData(void** module, const void* image)
{
    BEGIN(CONTEXT);
    REQUIRE(image, INVALID_VALUE);
    auto made = std::make_unique<int>(0);
    *module = made.get();
    all.modules[*module] = std::move(made);
    return OK;
}

int cuModuleUnload(void* module)
{
    BEGIN(CONTEXT);
    REQUIRE(all.modules.erase(module), INVALID_HANDLE);
    return OK;
}

int cuModuleGetFunction(const void** function, void* module, const char* name)
{
    BEGIN(CONTEXT);
    REQUIRE(all.modules.count(module), INVALID_HANDLE);
    const auto found = LAUNCHES.find(name);
    REQUIRE(found != LAUNCHES.end(), NOT_FOUND);
    *function = &found->second;
    return OK;
}

int cuLaunchKernel(const void* function, const unsigned grid_x, const unsigned grid_y, const unsigned grid_z,
                   const unsigned block_x, const unsigned block_y, const unsigned block_z, const unsigned shared_bytes,
                   void* stream, void** arguments, void** extra)
{
    BEGIN(CONTEXT);
    const auto s = stream_of(stream);
    REQUIRE(s && function, INVALID_HANDLE);
    REQUIRE(grid_x && block_x && block_x <= 1024 && grid_y == 1 && grid_z == 1, INVALID_VALUE);
    REQUIRE(block_y == 1 && block_z == 1 && shared_bytes == 0 && arguments && !extra, INVALID_VALUE);
    return (*static_cast<const Launch*>(function))(*s, grid_x, block_x, arguments);
}

}  // extern "C"
