#include "json.h"

#include <algorithm>
#include <optional>
#include <set>
#include <vector>

#include <nlohmann/json.hpp>

namespace iq
{

namespace
{

// Looks at JSON as it is read. Json::parse with a callback looks through a list for each object in
// it: a manifest of many takes hours.
struct Watch
{
    std::vector<std::set<std::string>> keys; // of each object that is open
    int64_t depth{0};
    int64_t deepest{0};
    std::optional<std::string> twice;

    bool open()
    {
        deepest = std::max(deepest, ++depth);
        return true;
    }
    bool close()
    {
        --depth;
        return true;
    }
    bool key(std::string const& name)
    {
        if (!keys.back().insert(name).second)
        {
            twice = name;
        }
        return true;
    }
    bool start_object(size_t /*size*/)
    {
        keys.emplace_back();
        return open();
    }
    bool start_array(size_t /*size*/)
    {
        return open();
    }
    bool end_object()
    {
        keys.pop_back();
        return close();
    }
    bool end_array()
    {
        return close();
    }
    bool null()
    {
        return true;
    }
    bool boolean(bool /*value*/)
    {
        return true;
    }
    bool number_integer(Json::number_integer_t /*value*/)
    {
        return true;
    }
    bool number_unsigned(Json::number_unsigned_t /*value*/)
    {
        return true;
    }
    bool number_float(Json::number_float_t /*value*/, std::string const& /*text*/)
    {
        return true;
    }
    bool string(std::string const& /*value*/)
    {
        return true;
    }
    template <typename Bytes>
    bool binary(Bytes const& /*value*/)
    {
        return true;
    }
    template <typename Exception>
    bool parse_error(size_t /*at*/, std::string const& /*token*/, Exception const& /*error*/)
    {
        return false;
    }
};

} // namespace

Document::Document(std::string const& text, std::string const& where)
    : mWhere(where)
{
    // The parser skips a byte order mark, and takes a NUL for the end: neither is JSON.
    bool const plain = text.find('\0') == std::string::npos && text.compare(0, 1, "\xef") != 0;
    Watch watch;
    if (!plain || !Json::sax_parse(text, &watch))
    {
        throw Refusal(ErrorCode::kBundle, where + " is not JSON: compile the bundle again");
    }
    if (watch.deepest > kDeepest)
    {
        throw Refusal(ErrorCode::kBundle,
            where + " is damaged (it is more than " + std::to_string(kDeepest)
                + " levels deep): compile the bundle again");
    }
    if (watch.twice)
    {
        throw Refusal(ErrorCode::kBundle,
            where + " is damaged (it has the key '" + *watch.twice
                + "' twice): compile the bundle again");
    }
    mJson = std::make_unique<Json>(Json::parse(text));
}

Document::~Document() = default;

Node Node::operator[](char const* key) const
{
    if (!has(key))
    {
        refuse(std::string("has no '") + key + "'");
    }
    return {mJson[key], mWhere + "." + key};
}

bool Node::has(char const* key) const
{
    if (!mJson.is_object())
    {
        refuse("is not an object");
    }
    return mJson.contains(key);
}

bool Node::isText() const noexcept
{
    return mJson.is_string();
}

bool Node::isList() const noexcept
{
    return mJson.is_array();
}

bool Node::isNull() const noexcept
{
    return mJson.is_null();
}

std::string const& Node::text() const
{
    if (!mJson.is_string())
    {
        refuse("is not a text");
    }
    return mJson.get_ref<std::string const&>();
}

int64_t Node::integer(int64_t low, int64_t high) const
{
    bool const fits = mJson.is_number_integer()
        && (!mJson.is_number_unsigned()
            || mJson.get<uint64_t>() <= static_cast<uint64_t>(INT64_MAX));
    int64_t const value = fits ? mJson.get<int64_t>() : 0;
    if (!fits || value < low || value > high)
    {
        refuse("is not an integer from " + std::to_string(low) + " to " + std::to_string(high));
    }
    return value;
}

bool Node::boolean() const
{
    if (!mJson.is_boolean())
    {
        refuse("is not true or false");
    }
    return mJson.get<bool>();
}

void Node::eachItem(std::function<void(Node const&)> const& visit) const
{
    if (!mJson.is_array())
    {
        refuse("is not a list");
    }
    for (size_t i = 0; i < mJson.size(); ++i)
    {
        visit({mJson[i], mWhere + "[" + std::to_string(i) + "]"});
    }
}

void Node::eachMember(std::function<void(std::string const&, Node const&)> const& visit) const
{
    if (!mJson.is_object())
    {
        refuse("is not an object");
    }
    for (auto const& item : mJson.items())
    {
        visit(item.key(), {item.value(), mWhere + "." + item.key()});
    }
}

void Node::refuse(std::string const& why) const
{
    throw Refusal(
        ErrorCode::kBundle, mWhere + " " + why + ": the file is damaged, compile the bundle again");
}

} // namespace iq
