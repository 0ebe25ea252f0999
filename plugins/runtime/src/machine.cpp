#include "machine.h"

#include <dlfcn.h>

#include "refusal.h"

namespace iq
{
namespace
{

// TensorRT for RTX counts from 1; the enterprise line was at 8 before plans of today existed.
constexpr int32_t kFirstEnterpriseMajor = 8;

using Number = int32_t (*)();

template <typename Function>
Function symbol(void* library, char const* name) noexcept
{
    return reinterpret_cast<Function>(::dlsym(library, name));
}

// As cuda.h declares them; CUDA's headers are not needed for this.
bool askDriver(void* driver, int32_t device, int32_t& major, int32_t& minor) noexcept
{
    constexpr int kMajorAttribute = 75; // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    constexpr int kMinorAttribute = 76;
    auto const init = symbol<int (*)(unsigned int)>(driver, "cuInit");
    auto const get = symbol<int (*)(int*, int)>(driver, "cuDeviceGet");
    auto const attribute = symbol<int (*)(int*, int, int)>(driver, "cuDeviceGetAttribute");
    int handle = 0;
    return init != nullptr && get != nullptr && attribute != nullptr && init(0) == 0
        && get(&handle, device) == 0 && attribute(&major, kMajorAttribute, handle) == 0
        && attribute(&minor, kMinorAttribute, handle) == 0;
}

} // namespace

void* openTensorRt(Flavour flavour, int32_t major, std::string const& path, std::string& why)
{
    std::string const stem = flavour == Flavour::kRtx ? "libtensorrt_rtx.so." : "libnvinfer.so.";
    std::string const name = path.empty() ? stem + std::to_string(major) : path;
    void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == nullptr)
    {
        char const* const reason = ::dlerror();
        why = reason == nullptr ? name + " cannot be loaded" : reason;
    }
    return library;
}

bool askVersion(void* library, TensorRt& version) noexcept
{
    constexpr char const* kNames[] = {"getInferLibMajorVersion", "getInferLibMinorVersion",
        "getInferLibPatchVersion", "getInferLibBuildVersion"};
    for (size_t i = 0; i < version.version.size(); ++i)
    {
        auto const ask = symbol<Number>(library, kNames[i]);
        if (ask == nullptr)
        {
            return false;
        }
        version.version[i] = ask();
    }
    version.flavour
        = version.version[0] < kFirstEnterpriseMajor ? Flavour::kRtx : Flavour::kEnterprise;
    return true;
}

Result<Probe> probeMachine(
    Flavour flavour, int32_t major, std::string const& library, int32_t device)
{
    return guarded<Probe>([&]() -> Result<Probe> {
        Probe probe;
        TensorRt version;
        void* const tensorRt = openTensorRt(flavour, major, library, probe.whyNoTensorRt);
        if (tensorRt != nullptr && askVersion(tensorRt, version))
        {
            probe.machine.tensorRt = version;
        }
        else if (tensorRt != nullptr)
        {
            probe.whyNoTensorRt = library + " is no TensorRT of today";
        }
        int32_t smMajor = 0;
        int32_t smMinor = 0;
        void* const driver = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
        if (driver == nullptr)
        {
            probe.whyNoDevice = "no NVIDIA driver is installed";
        }
        else if (askDriver(driver, device, smMajor, smMinor))
        {
            probe.machine.computeCapability = smMajor * 10 + smMinor;
        }
        else
        {
            probe.whyNoDevice = "the driver finds no GPU " + std::to_string(device);
        }
        return probe;
    });
}

} // namespace iq
