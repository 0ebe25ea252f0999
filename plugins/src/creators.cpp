// The creators, and the two symbols TensorRT looks for in a plugin library.
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "iq/log.h"
#include "iq/sink_op.h"

namespace iq
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

namespace
{

PluginField const* findField(PluginFieldCollection const& fields, char const* name)
{
    for (int32_t i = 0; i < fields.nbFields; ++i)
    {
        if (std::strcmp(fields.fields[i].name, name) == 0)
        {
            return &fields.fields[i];
        }
    }
    throw std::invalid_argument(std::string("field '") + name + "' is missing");
}

template <typename To, typename From>
std::vector<To> convert(PluginField const& field)
{
    auto const* const data = static_cast<From const*>(field.data);
    return std::vector<To>(data, data + field.length);
}

std::vector<float> floats(PluginFieldCollection const& fields, char const* name)
{
    PluginField const& field = *findField(fields, name);
    if (field.type != PluginFieldType::kFLOAT32)
    {
        throw std::invalid_argument(std::string("field '") + name + "' is not float");
    }
    return convert<float, float>(field);
}

// The ONNX parser hands over 32 or 64 bits, depending on its version.
std::vector<int64_t> integers(PluginFieldCollection const& fields, char const* name)
{
    PluginField const& field = *findField(fields, name);
    switch (field.type)
    {
    case PluginFieldType::kINT32: return convert<int64_t, int32_t>(field);
    case PluginFieldType::kINT64: return convert<int64_t, int64_t>(field);
    default: throw std::invalid_argument(std::string("field '") + name + "' is not integer");
    }
}

std::shared_ptr<TemplateTable> readTable(PluginFieldCollection const& fields)
{
    auto const shape = integers(fields, "template_shape");
    if (shape.size() != 2 || shape[0] < 1 || shape[1] < 1 || shape[0] > INT32_MAX
        || shape[1] > INT32_MAX)
    {
        throw std::invalid_argument("template_shape is not [templates, hidden]");
    }
    return std::make_shared<TemplateTable>(floats(fields, "templates"),
        static_cast<int32_t>(shape[0]), static_cast<int32_t>(shape[1]));
}

float readThreshold(PluginFieldCollection const& fields)
{
    auto const values = floats(fields, "threshold");
    if (values.size() != 1 || std::isnan(values[0]))
    {
        throw std::invalid_argument("threshold is not one number");
    }
    return values[0];
}

class Creator final : public nvinfer1::IPluginCreatorV3One
{
public:
    explicit Creator(OpKind const& kind)
        : mKind(kind)
        , mFields{PluginField("templates", nullptr, PluginFieldType::kFLOAT32, 0),
              PluginField("template_shape", nullptr, PluginFieldType::kINT32, 2)}
    {
        if (mKind.hasThreshold)
        {
            mFields.emplace_back("threshold", nullptr, PluginFieldType::kFLOAT32, 1);
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
    }

    nvinfer1::IPluginV3* createPlugin(char const* name, PluginFieldCollection const* fields,
        nvinfer1::TensorRTPhase /*phase*/) noexcept override
    {
        return guarded<nvinfer1::IPluginV3*>(
            name == nullptr ? mKind.name : name, nullptr, [this, fields] {
                if (fields == nullptr)
                {
                    throw std::invalid_argument("no fields");
                }
                float const threshold = mKind.hasThreshold ? readThreshold(*fields) : 0.0F;
                return new SinkOp(mKind, readTable(*fields), threshold);
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

} // namespace
} // namespace iq

#define IQ_EXPORT __attribute__((visibility("default")))

extern "C" IQ_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);
extern "C" IQ_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder);

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators)
{
    static iq::Creator detect(iq::kDetect);
    static iq::Creator clampInsert(iq::kClampInsert);
    static iq::Creator restore(iq::kRestore);
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&detect, &clampInsert, &restore};
    nbCreators = 3;
    return creators;
}

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    iq::setLoggerFinder(finder);
}
