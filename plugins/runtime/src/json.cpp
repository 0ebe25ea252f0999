#include "json.h"

#include <algorithm>
#include <set>

#include <nlohmann/json.hpp>

namespace iq
{

Document::Document(std::string const& text, std::string const& where)
    : mWhere(where)
{
    std::vector<std::set<std::string>> keys;
    std::string twice;
    Json::parser_callback_t const watch = [&](int, Json::parse_event_t event, Json& value) {
        if (event == Json::parse_event_t::object_start)
        {
            keys.emplace_back();
        }
        else if (event == Json::parse_event_t::object_end)
        {
            keys.pop_back();
        }
        else if (event == Json::parse_event_t::key
            && !keys.back().insert(value.get<std::string>()).second)
        {
            twice = value.get<std::string>();
        }
        return true;
    };
    mJson = std::make_unique<Json>(Json::parse(text, watch, false));
    if (mJson->is_discarded())
    {
        throw Refusal(ErrorCode::kBundle, where + " is not JSON: compile the bundle again");
    }
    if (!twice.empty())
    {
        throw Refusal(ErrorCode::kBundle,
            where + " is damaged (it has the key '" + twice + "' twice): compile the bundle again");
    }
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

std::string const& Node::oneOf(std::vector<std::string> const& words) const
{
    std::string const& word = text();
    if (std::find(words.begin(), words.end(), word) == words.end())
    {
        refuse("is '" + word + "', which is not known");
    }
    return word;
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
