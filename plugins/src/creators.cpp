// The creators, and the two symbols TensorRT looks for in a plugin library.
#include <memory>
#include <string>
#include <vector>

#include "iq/log.h"
#include "iq/op.h"

namespace iq
{
namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;

class Creator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit Creator(OpKind const& kind)
        : mKind(kind)
    {
        for (FieldSpec const* const spec : kind.fields)
        {
            mFields.emplace_back(spec->name, nullptr, spec->type, 1);
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
    }

    nvinfer1::IPluginV3* createPlugin(char const* name, PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase /*phase*/) noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(mKind.name, nullptr, [&]() -> nvinfer1::IPluginV3* {
            std::string const node = name == nullptr ? "" : name;
            try
            {
                return new Op(mKind, readSettings(mKind.fields, node, fields));
            }
            catch (std::exception const& error)
            {
                logError(std::string(mKind.name) + " '" + node + "': " + error.what());
                return nullptr;
            }
        });
    }

    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }

    char const* getPluginName() const noexcept override
    {
        return mKind.name;
    }

    char const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }

    char const* getPluginNamespace() const noexcept override
    {
        return kNamespace;
    }

private:
    OpKind const& mKind;
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

struct Creators
{
    Creators()
    {
        for (OpKind const* const kind : opKinds())
        {
            owned.push_back(std::make_unique<Creator>(*kind));
            pointers.push_back(owned.back().get());
        }
    }

    std::vector<std::unique_ptr<Creator>> owned;
    std::vector<nvinfer1::IPluginCreatorInterface*> pointers;
};

} // namespace
} // namespace iq

#define IQ_EXPORT __attribute__((visibility("default")))

extern "C" IQ_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
extern "C" IQ_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

nvinfer1::IPluginCreatorInterface* const* iq::allCreators(int32_t& count) noexcept
{
    return guarded<nvinfer1::IPluginCreatorInterface* const*>("getCreators", nullptr, [&] {
        count = 0;
        static Creators const creators;
        count = static_cast<int32_t>(creators.pointers.size());
        return creators.pointers.data();
    });
}

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    return iq::allCreators(nbCreators);
}

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    iq::setLoggerFinder(finder);
}
